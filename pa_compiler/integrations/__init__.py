"""What puts these kernels into other libraries: each in a folder of its name, which alone imports it."""
