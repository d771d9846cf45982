"""How long a call takes: as in the cache, and what memory adds in the order in which it reads. Without TVM."""
