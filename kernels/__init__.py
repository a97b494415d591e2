"""GPU kernels written in Triton, one concept a file. Installed as ``wandapp_kernels.kernels``."""
