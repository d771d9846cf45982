"""The LLVM CPU target: its features, tiles, machine code and explanation."""
