"""Trained models for their users: `inference` answers at the served setting, `export` writes a folder for anyone.

`standalone` is the file that is copied to that folder as `model.py`.
"""
