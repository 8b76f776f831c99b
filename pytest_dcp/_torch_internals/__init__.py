"""All private names of torch that the package uses: the one door to them, a module per subject.

Each name has its reason beside it, and the condition under which it can go. No other module of the
package imports a private name of torch or reads a private attribute of its objects
(`tests/unit/test_internals.py`), except the faces in `pytest_dcp.checkpoint`, which exist to have
the names of torch's module of the same name. So support for a new torch needs changes only here: a
name that has moved is imported from both places, a function that has changed has two bodies.

Where the installed torch lacks a name, importing the module raises `UnsupportedVersionError` in
words. The modules import torch, so the plugin's start must not import them.
"""
