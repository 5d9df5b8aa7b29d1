"""Slow, obvious versions of every method, written from the papers, to test the fast ones against.

They share no code with the library: plain Python loops, or one line of float64 torch per formula.
"""
