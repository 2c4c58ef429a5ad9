"""The speed tables: what each part of degflow costs, beside the released procedure with the same weights.

Times are medians over repeats in which the ways alternate, and a ratio is the median of each repeat's ratio, so that a
busy machine slows both.

run             the job: every part in turn
measure         clocks, peaks of memory, tables
plain           the released procedure
inference       the networks: accuracy, comparison, roofline, a large image
optimisations   what each optimisation should gain, and gains
steps           the training steps
pipeline        the Ray job and the codecs
node            a model of one node with many GPUs: which stage binds
scale           planning many photographs, and finding finished shards
stand_in        a degrader that only sleeps
"""
