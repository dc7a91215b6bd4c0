# Open MPI (Debian: openmpi-bin).
command -v mpirun >/dev/null || { echo "mpirun is not installed"; exit 77; }
port=$((20000 + RANDOM % 10000))
exec mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 -x FERROTUNE_MASTER_PORT=$port "$FERROTUNE" "$@"
