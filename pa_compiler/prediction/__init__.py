"""How long a call takes: its machine code on a model of a core, and what memory gives in its order. Without TVM."""
