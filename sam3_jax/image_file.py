"""Image files: which formats are read, and the one way to open them."""

# Pillow's names of the formats that are read, and the endings their files have. Not in the table,
# so refused whatever Pillow could do: formats that start another program (EPS starts Ghostscript),
# hand over to plug-ins (HDF5, GRIB, FITS, WMF), are decoded in Python and so slowly that a small
# file can keep a process busy for minutes, or that nobody keeps photographs in.
SUFFIXES_BY_FORMAT: dict[str, tuple[str, ...]] = {
  "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
  "MPO": (".mpo",),
  "PNG": (".png", ".apng"),
  "WEBP": (".webp",),
  "TIFF": (".tif", ".tiff"),
  "GIF": (".gif",),
  "BMP": (".bmp",),
  "DIB": (".dib",),
  "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
  "AVIF": (".avif", ".avifs"),
  "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
  "TGA": (".tga",),  # last: it has no signature
}
FORMATS = tuple(SUFFIXES_BY_FORMAT)
IMAGE_SUFFIXES = frozenset(end for ends in SUFFIXES_BY_FORMAT.values() for end in ends)
