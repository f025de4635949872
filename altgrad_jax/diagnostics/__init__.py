"""Pure functions from arrays to named scalars; one file per question asked.

A question has a device side (arrays in, one small array of values out, inside the jitted program) and a host side that
names the values: `quant/<role>/<what>` over all layers, `quant/<layer>/<role>/<what>` of one.
"""
