"""Our engine under code that imports torch's: `torch.distributed.checkpoint` gives ours.

Nothing of the code is edited. A process is told by an environment variable, which its children
inherit, and by a `sitecustomize` on its path, which every Python imports when it starts:

    start      `site/sitecustomize.py` puts `import_hook` in the way of imports, and no more
    import     whenever torch's package, or a module of it, has been imported, `replaced_names`
               gives it our names in place of torch's; also in modules that took some before
    end        what only torch's engine has is listed, see `fallbacks`

torch's modules stay the objects that they are, so `import`, `from ... import` and attributes all
find our names. Types that both engines share (plans, metadata, abstract bases) are torch's anyway.
"""
