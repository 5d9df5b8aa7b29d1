"""Plug-ins: what other programs import of secateur. One folder or file for each program."""
