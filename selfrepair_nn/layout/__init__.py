"""From what a user asks for to the units of work of a run, before anything runs."""
