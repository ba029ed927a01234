"""Who runs when: the scheduler, its blocks, the loop. No torch, no text, no HTTP."""
