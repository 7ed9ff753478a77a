"""Options of data loading reach it from every script that trains on images or encodes them."""

import json

import pytest

import softvq_hf.data


class Stop(Exception):
    """Ends a script once its data would be loaded."""


TRAIN_SIT = ["--vae=vae", "--validation_steps=0", f"--model={json.dumps({'num_layers': 1})}"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_softvq", None),
        ("train_sit", [*TRAIN_SIT, "--max_train_steps=1"]),
        ("cache_latents", None),
    ],
)
@pytest.mark.parametrize("name", ["jpeg_draft", "fast_resize"])
def test_faster_loading_reaches_the_data(script, flags, name, run_main, tokenizer_dir, tmp_path, monkeypatch):
    seen = []

    def record(*arguments, **options):
        seen.append(options)
        raise Stop

    monkeypatch.setattr(softvq_hf.data, "load_image_dataset", record)
    if flags is None:
        flags = [f"--pretrained_model_name_or_path={tokenizer_dir}"]
    if script == "train_softvq":
        flags = [*flags, "--resolution=32", "--validation_steps=0", "--max_train_steps=1"]
    flags = [*flags, "--dataset_name=photographs", f"--output_dir={tmp_path / 'run'}"]
    for given in ([], [f"--{name}=true"]):
        with pytest.raises(Stop):
            run_main(script, *flags, *given)
    assert [options[name] for options in seen] == [False, True]
