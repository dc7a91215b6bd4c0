# TorchX's local_cwd scheduler: two replicas of a role; the rank comes from the macro ${replica_id}.
"$PYTHON" -c 'import torchx.runner' 2>/dev/null || { echo "$PYTHON has no torchx"; exit 77; }
exec "$PYTHON" tests/launchers/torchx_run.py "$FERROTUNE" "$@"
