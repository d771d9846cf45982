"""TensorIR with explicit threads: what a GPU computes. No schedule follows.

The PrimFuncs are read by TVM's own T.prim_func, since tvmscript.prim_func is for those that are scheduled.
"""
