"""Sessions that an outer launcher starts: torchrun, srun, mpirun. Imported only there."""
