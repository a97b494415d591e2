"""Other libraries: each module here is imported only when its library is."""
