"""How long a call takes, by its machine code: on a model of a core, and then what memory gives in the call's order."""
