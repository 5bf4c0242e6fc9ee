"""The 8-bit moments of other transformations, which `quantize_state` keeps."""
