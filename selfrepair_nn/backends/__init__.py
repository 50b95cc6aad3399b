"""Where units of work are carried out: in this process, or on a server."""
