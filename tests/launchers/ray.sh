# Ray Train: a TorchTrainer whose workers start the binary.
"$PYTHON" -c 'import torch, ray.train.torch' 2>/dev/null || { echo "$PYTHON has no ray.train with torch"; exit 77; }
exec "$PYTHON" tests/launchers/ray_train.py "$FERROTUNE" "$@"
