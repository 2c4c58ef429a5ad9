"""The dataset that `synthesize` makes: its layout, its plan, and how it is written and read.

layout          names and schemas of the objects
plan            the photographs of each shard
recipe          the keys that decide the rows, and their digests
scales          the scale of each draw of a photograph
writer          a shard's rows -> its object
footer          the record and the rejects in that object's footer
manifest        which shards are done; rejects/ and manifest.parquet
references      the photographs of rows without HR bytes
card            README.md and preview.png
croissant       croissant.json
gallery         preview.html
reader          the rows of a finished dataset, or of the parts that are there
epoch           the epoch's number, shared with running loader workers
order           the order of an epoch's rows, as numbers
ranks           which rank a process is, and the parts that all ranks read
pairs           a dataset as a PyTorch dataset of aligned crops
exports         a finished dataset as folders or tars for other trainers
export_parts    the export of parts, by several processes
export_layouts  a class for each layout of an export
"""
