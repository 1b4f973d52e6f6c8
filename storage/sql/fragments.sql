-- Fragments that statements of more than one file share. A statement names one as {name}.

-- fragment: utc_now
-- The moment as Optuna's tables keep it: UTC, without a time zone.
hpo.clock() AT TIME ZONE 'UTC'

-- fragment: this_call
-- The row of hpo.calls that this very call has left, if an earlier try of it was committed.
client = %(client)s AND call = %(call)s

-- fragment: claim
-- The end of an INSERT INTO hpo.calls: the call happens once, as its row is replaced by later calls only.
ON CONFLICT (client) DO UPDATE SET call = excluded.call, result = excluded.result, called_at = hpo.clock()
WHERE calls.call < excluded.call

-- fragment: elapsed
-- Seconds in which the study had a live worker. Its clock goes on for ten seconds at most without a sign of one.
(elapsed_s + coalesce(greatest(0, extract(epoch FROM least(hpo.clock(), clock_at + interval '10 s') - clock_at)), 0)::float8)

-- fragment: out_of_time
-- Whether the study's time is spent.
coalesce({elapsed} >= timeout_s, false)
