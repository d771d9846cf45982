"""What a deployed library needs: loading, calling, checking. Imports neither TVM nor anything that compiles."""
