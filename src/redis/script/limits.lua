-- What an administrator does, for all nodes.

-- Other limits for now, of all these cells or of none, or with override 0 the config's again.
function run.limit()
  local override, changes = int(), {}
  for i = 1, int() do changes[i] = { text(), int(), int() } end
  local names = redis.call('HKEYS', cells_key)
  load(names)
  for _, change in ipairs(changes) do
    if not cells[change[1]] then return { UNKNOWN, now } end
  end
  if not advance(names) then return { BOUNDS, now } end
  for _, change in ipairs(changes) do
    local cell, limit, burst = cells[change[1]], change[2], change[3]
    if not cell.class then cell.whole = cell.whole + burst - cell.burst end
    cell.limit, cell.burst, cell.override = limit, burst, override
  end
  for _, name in ipairs(names) do dirty[name] = true end
  save()
  return { DONE, now }
end

-- Everything whole again, but for what is held.
function run.reset()
  local names = redis.call('HKEYS', cells_key)
  if #names == 0 then return { UNKNOWN, now } end
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell.class then cell.used = 0 else cell.whole, cell.fraction = cell.burst - cell.held, 0 end
    cell.resets = (cell.resets or 0) + 1
    dirty[name] = true
  end
  save()
  return { DONE, now }
end
