"""The only rooms that run inside the model's process.

Everything here may be shipped to a server whose process holds the model's structure without its weights. So this code
imports torch and nothing else, takes and returns plain tensors, lists and dicts, reads activations and calls modules,
and never touches a parameter. A plan is a dict: `plan["model"]` describes the model (models.architectures.Structure as
a dict), the rest says what to ablate, freeze and record (graph.Graph.plan).
"""
