"""oneDNN's primitives, made and owned here through the C API inside PyTorch's own library.

`symbols.py` finds the functions, `primitives.py` calls them, `implementations.py` chooses who does the arithmetic, and
`layer.py` makes of these one layer: its weight packed, and one call of C for each input. `any_size.py` has such a layer
for inputs of any size, and `images.py` lays inputs out.
"""
