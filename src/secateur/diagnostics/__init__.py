"""Diagnostics: is the model what it claims to be?"""
