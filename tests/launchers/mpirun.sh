# Open MPI (Debian: openmpi-bin).
command -v mpirun >/dev/null || { echo "mpirun is not installed"; exit 77; }
# On one machine no remote shell is needed, but Open MPI asks for one all the same.
export OMPI_MCA_plm_rsh_agent=/bin/false
port=$((20000 + RANDOM % 10000))
exec mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 -x FERROTUNE_MASTER_PORT=$port "$FERROTUNE" "$@"
