"""Who runs when: the scheduler, the block pool, the loop and the sockets around it. Token ids only, no tensors."""
