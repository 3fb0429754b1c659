"""Lava processes of the toolchain and their models. Lava executes every file of this folder by its own means: nothing here may act on import."""
