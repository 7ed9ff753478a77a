"""Pipelines, one file each: importable as `softvq_hf.pipelines`, and given to diffusers as `custom_pipeline=`."""
