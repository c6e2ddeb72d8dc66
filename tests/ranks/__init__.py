"""Cases for several processes: programs that torchrun starts, and the tests that read what their ranks found."""
