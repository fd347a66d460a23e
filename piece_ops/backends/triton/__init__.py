"""Home of the Triton kernels (tensor-core work); none in this version."""
