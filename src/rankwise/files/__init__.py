"""Atomic writing of folders and files, files of tensors, and downloads from the hub."""
