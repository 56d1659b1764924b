"""One engine for the trainings of all studies: vmapped over seeds, one by one, or on a mesh."""

from bnjax.studies.engine.inference import POPULATION, at_inference, evaluations, with_population_statistics  # noqa: F401
from bnjax.studies.engine.plan import (  # noqa: F401
    Examples,
    Plan,
    Trained,
    Variant,
    compiler_options,
    divisor_from,
    divisor_up_to,
    random_batch,
    seed_keys,
    step_keys,
)
from bnjax.studies.engine.training import ONE_BY_ONE, Job, Report, in_threads, train, train_all  # noqa: F401
