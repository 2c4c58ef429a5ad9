"""HR photographs in a folder or an object store -> a dataset of LR images at sampled scales, on a pool of Ray actors.

The way of one photograph through the job:

 1. `run.Run.plan`                the run resolves its configuration, and reads what the output already holds
 2. `inventory.Input.images`      the photograph is listed with its size and version tag
 3. `run.Run.claim`               a shard gets it; the plan is written before any work starts, and may only grow
 4. `pool.Pool.make`              the shard goes to an actor (`actor.ShardActor`), which holds the degrader
 5. `shard.ShardMaker.make`       the actor takes the photograph in a window of its shard
 6. `codec.Codec.load`            a thread, or a Ray task if actors have GPUs, reads and decodes it
 7. `window.WindowDegrader.degrade`   it is degraded to the scales of its draws (`dataset.scales.scales_of`)
 8. `codec.Codec.encode`          HR and LR images become rows, as PNG or WebP
 9. `dataset.writer.ShardWriter.finish`   the shard's rows and rejects are put into the output, as one object
10. `run.Run.finish`              after all shards: rejects, manifest, card, preview, and last `_SUCCESS`

A file that fails on this way becomes a reject with a stage and a reason. `settings` has the keys. `resuming` decides
whether a run may continue an unfinished dataset, and `state` reads what of it is there.
"""
