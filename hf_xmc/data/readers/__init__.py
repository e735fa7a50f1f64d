"""Readers of the file formats that :func:`hf_xmc.load_xmc` knows, one module for each family of formats."""
