"""What the CPU needs beside a formula: routes through ATen and the C++ kernels of `mfmjt._C`."""
