"""Codecs: a network, a spec and a backend behind one API."""
