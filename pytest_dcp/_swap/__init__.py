"""Our engine under code that imports torch's: `torch.distributed.checkpoint` gives ours.

The code is not edited. An environment variable, which children inherit, and a `sitecustomize` on
the path, which every Python imports when it starts, make a process swap engines:

    start      `site/sitecustomize.py` only installs `import_hook`
    import     whenever torch's package, or a module of it, has been imported, `replaced_names`
               replaces torch's names in it by ours, and in modules that imported some before
    end        modules that only torch's engine has are listed, see `fallbacks`

torch's modules remain the same objects, so `import`, `from ... import` and attributes all find our
names. Types that both engines share (plans, metadata, abstract bases) are torch's anyway.
"""
