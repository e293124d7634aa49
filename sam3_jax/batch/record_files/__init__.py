"""Files with many images as records: Parquet, Arrow, ArrayRecord, TFRecord, and datasets by name.

`listing` lists the records of a file without reading the images. `open_files` reads one image by
the index of its record, in any order and in any process. Records at known offsets (TFRecord, Arrow)
are read like members of a tar file.
"""
