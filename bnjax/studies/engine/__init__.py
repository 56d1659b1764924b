"""One engine for the trainings of all studies: vmapped over seeds, one by one, or on a mesh."""
