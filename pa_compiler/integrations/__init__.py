"""What puts these kernels into other libraries: each in a folder or file of its name, which alone imports that library."""
