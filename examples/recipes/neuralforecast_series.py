"""neuralforecast: a forecaster of some series learns others. About ten seconds on two cores, with made-up series.

Both steps get whole series. `training_step` cuts its windows from the part to train on, whichever loader the series
come from. `validation_step` cuts them from the last `val_size` points, held out. The radii learn from its loss.

    python examples/recipes/neuralforecast_series.py
"""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

from lightning_tpgm import TPGMCallback


def series(period):
    """Six noisy waves of 48 points."""
    time, noise = np.arange(48), np.random.default_rng(0)
    waves = [np.sin(time / period + phase) + 0.1 * noise.standard_normal(48) for phase in range(6)]
    return pd.concat([pd.DataFrame({"unique_id": str(i), "ds": time, "y": wave}) for i, wave in enumerate(waves)])


network = NHITS(h=4, input_size=8, mlp_units=[[16, 16]] * 3, max_steps=24, val_check_steps=8)
project = NeuralForecast(models=[network], freq=1)
# yours: project = NeuralForecast.load("pretrained"), and no first fit
project.fit(series(period=2), val_size=8)

model = project.models[0]
# no layer is new, since the horizon stays: nothing is excluded
tpgm = TPGMCallback(loss="validation_step", exclude=[])
model.trainer_kwargs["callbacks"] = [tpgm]
project.fit(series(period=3), val_size=8)  # goes on from the weights that are there
for row in tpgm.report():
    print(f"{row['name']:70} {row['distance']:.4f}")
