-- Commands of an administrator. They apply to all nodes.

-- Who set the override of each cell and why, as the nodes wrote it, and that of `enforce`. Redis does not read it.
local overrides_key = cells_key .. ':overrides'
local ENFORCE = 'enforce'

-- Records who set an override; an empty text: it has ended. The nodes read the texts when the version has changed.
local function record_override(name, text)
  if text == '' then redis.call('HDEL', overrides_key, name) else redis.call('HSET', overrides_key, name, text) end
  redis.call('HINCRBY', meta_key, 'overrides', 1)
end

-- Sets new limits for all of these cells or for none. `override`: 0: these are the limits of the config again; 1: until
-- they are deleted; else when they end. The limits of the config follow those to set.
function commands.limit()
  local override, origin, changes = read_int(), read_text(), {}
  for i = 1, read_int() do changes[i] = { read_text(), read_int(), read_int(), read_int(), read_int() } end
  local names = redis.call('HKEYS', cells_key)
  load_cells(names)
  for _, change in ipairs(changes) do
    if not cells[change[1]] then return { UNKNOWN_SESSION, now } end
  end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  for _, change in ipairs(changes) do
    local cell = cells[change[1]]
    set_limits(cell, change[2], change[3])
    cell.override, cell.file_limit, cell.file_burst = override, change[4], change[5]
    record_override(change[1], origin)
  end
  for _, name in ipairs(names) do is_changed[name] = true end
  save_cells()
  return { DONE, now }
end

-- Sets whether quotas are enforced. `value`: 0: by the config; 1: shadow mode; 2: enforced. `ends`: 1: when it is
-- deleted, else when it ends.
function commands.enforce()
  local value, ends, origin = read_int(), read_int(), read_text()
  if value == 0 then
    redis.call('HDEL', meta_key, 'enforce', 'enforce_until')
  else
    redis.call('HSET', meta_key, 'enforce', value, 'enforce_until', ends)
  end
  record_override(ENFORCE, origin)
  return { DONE, now }
end

-- Restores the config where an override has ended.
local function end_overrides(names)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell.override > 1 and now >= cell.override then
      set_limits(cell, cell.file_limit, cell.file_burst)
      cell.override, is_changed[name] = 0, true
      record_override(name, '')
    end
  end
  local ends = tonumber(redis.call('HGET', meta_key, 'enforce_until')) or 0
  if ends > 1 and now >= ends then
    redis.call('HDEL', meta_key, 'enforce', 'enforce_until')
    record_override(ENFORCE, '')
  end
end

-- Replies with who set the override of each of these cells, and that of `enforce`: the number of bytes, and the bytes.
function commands.origins()
  local names, reply = read_texts(read_int()), { DONE, now }
  names[#names + 1] = ENFORCE
  for _, name in ipairs(names) do
    local text = redis.call('HGET', overrides_key, name) or ''
    reply[#reply + 1] = #text
    for i = 1, #text do reply[#reply + 1] = text:byte(i) end
  end
  return reply
end

-- Restores these quotas to full, or all of them if there are none. Held amounts stay held.
function commands.reset()
  local names = redis.call('HKEYS', cells_key)
  if #names == 0 then return { UNKNOWN_SESSION, now } end
  load_cells(names)
  local chosen = read_texts(read_int())
  for _, name in ipairs(chosen) do if not cells[name] then return { UNKNOWN_SESSION, now } end end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  for _, name in ipairs(#chosen > 0 and chosen or names) do
    local cell = cells[name]
    if cell.class then
      cell.used = 0
    else
      cell.whole, cell.fraction, cell.clock = cell.burst - cell.held, 0, 0
    end
    cell.resets, cell.excess = (cell.resets or 0) + 1, nil
  end
  for _, name in ipairs(names) do is_changed[name] = true end
  -- What a node would restore from now on was used before the reset.
  if #chosen > 0 then
    redis.call('HDEL', cells_key .. ':bases', unpack(chosen))
  else
    redis.call('PEXPIRE', cells_key .. ':bases', 0)
  end
  save_cells()
  return { DONE, now }
end
