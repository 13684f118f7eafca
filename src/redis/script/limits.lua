-- Commands of an administrator. They apply to all nodes.

-- Sets new limits for all of these cells or for none. `override` 0: these are the limits of the config again.
function commands.limit()
  local override, changes = read_int(), {}
  for i = 1, read_int() do changes[i] = { read_text(), read_int(), read_int() } end
  local names = redis.call('HKEYS', cells_key)
  load_cells(names)
  for _, change in ipairs(changes) do
    if not cells[change[1]] then return { UNKNOWN_SESSION, now } end
  end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  for _, change in ipairs(changes) do
    local cell, limit, burst = cells[change[1]], change[2], change[3]
    if not cell.class then cell.whole = cell.whole + burst - cell.burst end
    cell.limit, cell.burst, cell.override = limit, burst, override
  end
  for _, name in ipairs(names) do is_changed[name] = true end
  save_cells()
  return { DONE, now }
end

-- Restores all quotas to full. Held amounts stay held.
function commands.reset()
  local names = redis.call('HKEYS', cells_key)
  if #names == 0 then return { UNKNOWN_SESSION, now } end
  load_cells(names)
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell.class then cell.used = 0 else cell.whole, cell.fraction = cell.burst - cell.held, 0 end
    cell.resets = (cell.resets or 0) + 1
    is_changed[name] = true
  end
  -- What a node would restore from now on was used before the reset.
  redis.call('PEXPIRE', cells_key .. ':bases', 0)
  save_cells()
  return { DONE, now }
end
