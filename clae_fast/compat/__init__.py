"""Drop-ins: the losses of other libraries by their own names, on the fused losses of this one.

One changed import is the whole migration: `clae_fast.compat.<library>` has the class names,
signatures, defaults, shapes and meaning of `<library>`, and does not import it. An option that is
not served raises and says so. Everywhere: half precision is computed in float32 and gives a float32
loss; a zero vector gets a zero gradient; a row with nothing to contrast counts as 0, not NaN.
"""
