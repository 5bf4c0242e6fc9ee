"""Parameters that are DTensors: every process computes on its shard, and only statistics are exchanged.

`torch.distributed.fsdp.fully_shard` makes such parameters.  They are split along axis 0, over one dimension of a device
mesh, and may be replicated over the others.  States are DTensors of the shapes and dtypes that they have unsharded.
Imported only where there is such a parameter.
"""
