"""Folders of Hugging Face transformers whose models are this project's under other names, both ways.

families.py    which they are, and what their config.json says in the fields of `model`
names.py       which of their tensors are which of ours
weights.py     their tensors, read and held against both
"""
