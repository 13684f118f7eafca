-- Commands for the sessions of nodes: join, heartbeat, leave, and the charge of sessions that ended without `leave`.

-- Reads the node's copy of a cell. The arguments are kind, class (empty: a rolling quota), period, limit and burst of
-- the config, limit and burst in force, and their override: 0: none, 1: until it is deleted, else when it ends. Three
-- numbers of the state with nothing held follow: level, fraction and 0 for a rolling quota; used, 0 and turn for a
-- calendar quota and for an unlimited one. Then 1 if the config has the quota, 0 if only the node's counters still do.
-- Returns nil if the bounds of a calendar period are stale.
local function read_cell()
  local kind, class, per = read_int(), read_text(), read_int()
  local configured = { limit = read_int(), burst = read_int() }
  local limit, burst, override = read_int(), read_int(), read_int()
  local whole, fraction, turn = read_int(), read_int(), read_int()
  configured.is_in_config = read_int() == 1
  local cell = { kind = kind, per = per, limit = limit, burst = burst, held = 0, override = override, seen = now }
  if override ~= 0 then cell.file_limit, cell.file_burst = configured.limit, configured.burst end
  if class == '' then
    cell.whole, cell.fraction, cell.at = whole, fraction, now
    if limit == 0 then
      cell.clock, cell.since, cell.whole = whole, turn, 0
    end
    roll_clock(cell)
    return cell, configured
  end
  local period = period_bounds[class]
  if not period or now < period[1] or now >= period[2] then return nil end
  cell.class, cell.used, cell.turn, cell.start, cell.stop = class, whole, turn, period[1], period[2]
  return cell, configured
end

-- Holds a reservation that the node has and the server does not have. `is_new`: the server never received the
-- reservation, so its spent tokens are charged too. Otherwise the server lost the reservation together with the
-- cells, and the restored cells already contain the spent tokens.
local function restore_reservation(pieces, is_new)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local spent = is_new and moved[cell.kind] or 0
        cell.held = cell.held + held
        if cell.class then
          cell.used = cell.used + spent
        else
          cell.whole = cell.whole - held - spent
          count(cell, spent)
        end
        is_changed[name] = true
      end
    end
  end
end

-- Charges a reservation in full: its session has ended, or its node does not list it any more.
local function charge_in_full(pieces)
  for _, piece in ipairs(pieces) do settle_piece(piece, piece[1]) end
end

-- The states from which cells were created. Redis expires this key.
local bases_key = cells_key .. ':bases'

-- Remembers the state from which a cell was created.
local function save_base(name, base)
  redis.call('HSET', bases_key, name, cmsgpack.pack(base))
  redis.call('PEXPIRE', bases_key, LATE_RESTORE_MS)
end

-- Restores a lost cell from the states of several nodes. The state with the lowest remaining amount is used. The
-- cell was created from the state of the first node, its base, and has changed since. It is therefore charged with
-- the difference between this node's state and the base. If the node's state contains such changes too, the cell
-- takes the lower of the two levels.
local function restore_level(name, cell, node, is_same_data_set)
  if cell.limit == 0 and not cell.class then
    if cell.since == node.since then cell.clock = max(cell.clock, node.clock) end
    return
  end
  local packed = not is_same_data_set and redis.call('HGET', bases_key, name)
  if packed then
    local base = cmsgpack.unpack(packed)
    local missing
    if not cell.class then
      refill(base)
      missing = base.whole - node.whole
      if missing > 0 then cell.whole = cell.whole - missing end
    else
      missing = cell.turn == node.turn and base.turn == node.turn and node.used - base.used or 0
      if missing > 0 then cell.used = cell.used + missing end
    end
    if missing > 0 then save_base(name, node) end
  elseif not cell.class then
    cell.whole = min(cell.whole, node.whole - cell.held)
  elseif cell.turn == node.turn then
    cell.used = max(cell.used, node.used)
  end
end

-- The used amount of a cell together with the held amount.
local function used_of(cell)
  if cell.class then return now < cell.stop and cell.used + cell.held or 0 end
  return max(cell.burst - cell.whole, 0)
end

-- The owner of a cell by its name: its caller or its pattern of models, or empty for the environment.
local function owner_of(name)
  local caller, model = name:find('/caller/', 1, true), name:find('/model/', 1, true)
  local at = caller and model and min(caller, model) or caller or model
  return at and name:sub(at) or ''
end

-- Groups cells by owner and kind, the longest period first.
local function by_owner_and_kind(names)
  table.sort(names, function(a, b)
    local one, other = cells[a].per, cells[b].per
    if one ~= other then return one > other end
    return a < b
  end)
  local groups = {}
  for _, name in ipairs(names) do
    local key = cells[name].kind .. owner_of(name)
    groups[key] = groups[key] or {}
    table.insert(groups[key], name)
  end
  return groups
end

-- Created cells, and those that are in use again, continue cells that this node does not have, of the same owner and kind:
-- they belong to quotas whose period, window or time zone has changed. The longest period continues the longest. The used
-- amount stays, up to the new capacity. An unlimited quota counts from zero.
local function continue_removed(created, own_names)
  local is_own, removed = {}, {}
  for _, name in ipairs(own_names) do is_own[name] = true end
  for _, name in ipairs(redis.call('HKEYS', cells_key)) do
    if not is_own[name] then removed[#removed + 1] = name end
  end
  load_cells(removed)
  advance_to_now(removed)
  local earlier = by_owner_and_kind(removed)
  local limited = {}
  for _, name in ipairs(created) do if cells[name].limit ~= 0 then limited[#limited + 1] = name end end
  for key, group in pairs(by_owner_and_kind(limited)) do
    for rank, name in ipairs(group) do
      local cell, before = cells[name], earlier[key] and (earlier[key][rank] or earlier[key][#earlier[key]])
      local used = before and min(used_of(cells[before]), max_carried(cell)) or 0
      if cell.class then
        cell.used = max(cell.used, used)
      elseif cell.burst - used < cell.whole then
        cell.whole, cell.fraction = cell.burst - used, 0
      end
    end
  end
end

-- The key of sessions that have ended, each with the number of its last applied step. There is one key for each day
-- on which sessions ended. Redis expires the key, so no command has to search for old sessions.
local function ended_sessions_key(days_ago)
  return meta_key .. ':over:' .. string.format('%.0f', floor(now / RETENTION_MS) - days_ago)
end

local function archive_session(ended)
  local applied = redis.call('HGET', meta_key, 'q:' .. ended) or 0
  redis.call('HDEL', meta_key, 's:' .. ended, 'q:' .. ended, 'o:' .. ended, 'c:' .. ended)
  redis.call('HSET', ended_sessions_key(0), ended, applied)
  redis.call('PEXPIRE', ended_sessions_key(0), 2 * RETENTION_MS)
end

-- The number of the last applied step of this session, if it has ended.
local function archived_step()
  return redis.call('HGET', ended_sessions_key(0), session) or redis.call('HGET', ended_sessions_key(1), session)
end

local function count_alive()
  local fields, alive = redis.call('HGETALL', meta_key), 0
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 's:' and tonumber(fields[i + 1]) > now then alive = alive + 1 end
  end
  redis.call('HSET', meta_key, 'alive', alive)
end

-- The config of a session: when it was written, and when the session joined for the first time. Older versions do not
-- record it. They have at most the newest one that is recorded.
local function config_of(other)
  local packed = redis.call('HGET', meta_key, 'c:' .. other)
  return packed and cmsgpack.unpack(packed) or { tonumber(redis.call('HGET', meta_key, 'stamp')) or 0, 0 }
end

local function is_older(config, than)
  return config[1] < than[1] or (config[1] == than[1] and config[2] < than[2])
end

-- The number of other sessions that are open, and whether none of them has a newer config than this one. A session that
-- the next heartbeat renews after an outage is open.
local function compare_config(config)
  local beat = tonumber(redis.call('HGET', meta_key, 'beat')) or now
  local fields, others, is_newest = redis.call('HGETALL', meta_key), 0, true
  for i = 1, #fields, 2 do
    local other = fields[i]:sub(1, 2) == 's:' and fields[i]:sub(3)
    local ends = other and other ~= session and tonumber(fields[i + 1]) or 0
    if ends > now or (ends > 0 and now - beat > OUTAGE_MS) then
      others = others + 1
      is_newest = is_newest and not is_older(config, config_of(other))
    end
  end
  return others, is_newest
end

-- `has_set_limits`: the limits of this config are in force.
local function record_config(config, is_newest, has_set_limits)
  redis.call('HSET', meta_key, 'c:' .. session, cmsgpack.pack(config))
  if is_newest then redis.call('HSET', meta_key, 'stamp', config[1]) end
  if has_set_limits then redis.call('HSET', meta_key, 'limits_of', session) end
end

-- Whether the limits of this session's config should be in force, and are not: the session whose limits are in force
-- has ended.
local function must_set_limits()
  local holder = redis.call('HGET', meta_key, 'limits_of')
  if holder == session then return false end
  if holder and (tonumber(redis.call('HGET', meta_key, 's:' .. holder)) or 0) > now then return false end
  local _, is_newest = compare_config(config_of(session))
  return is_newest
end

-- The cells that exist, and that the newest config before this one did not have.
local function cells_used_again(names, configured)
  local packed = redis.call('HGET', meta_key, 'names')
  if not packed then return {} end
  local is_known, again = {}, {}
  for _, name in ipairs(cmsgpack.unpack(packed)) do is_known[name] = true end
  for _, name in ipairs(names) do
    if cells[name] and configured[name].is_in_config and not is_known[name] then again[#again + 1] = name end
  end
  return again
end

-- Records the cells of the newest config.
local function record_names(names, configured)
  local own = {}
  for _, name in ipairs(names) do if configured[name].is_in_config then own[#own + 1] = name end end
  redis.call('HSET', meta_key, 'names', cmsgpack.pack(own))
end

-- Opens a session for the first time or again. Missing cells are created from the node's state. Existing cells take
-- their limits from the newest config of the nodes alive, unless an administrator set them: from the one with the
-- highest stamp, and among equal ones from that of the session that joined last. Replies with six numbers: cells
-- created; cells with limits other than those of other nodes; 1 if the session was remembered; milliseconds to wait;
-- the number of the last applied step; and the data set, which is the time when the first cell was created. After the
-- server has lost its data, a node waits for this time until other nodes have restored their state. A server that was
-- a lagging replica, or that was restored from an older file, has applied fewer steps than were acknowledged. The node
-- repeats the others, from the step `oldest` on.
function commands.join()
  local stamp, has_joined_before, oldest, acknowledged = read_int(), read_int() == 1, read_int(), read_int()
  local known_data_set, first_joined = read_int(), read_int()
  local enforce, enforce_until, cell_count = read_int(), read_int(), read_int()
  local names, from_node, configured = {}, {}, {}
  for i = 1, cell_count do
    local name = read_text()
    names[i] = name
    from_node[name], configured[name] = read_cell()
    if not from_node[name] then return { STALE_PERIOD, now } end
  end
  local meta = redis.call('HMGET', meta_key, 's:' .. session, 'regains', 'q:' .. session, 'born')
  local restoring_until = tonumber(meta[2]) or 0
  local archived = not meta[1] and archived_step()
  local data_set = tonumber(meta[4]) or now
  local is_same_data_set = known_data_set == data_set
  -- If the server has the same data set without this session, it has applied none of the session's steps. The node
  -- can repeat all of them.
  local is_remembered = meta[1] or archived or (is_same_data_set and oldest == 1)
  -- The states of a node whose session is lost contain everything that was acknowledged.
  local applied = is_remembered and max(tonumber(meta[3] or archived) or 0, oldest - 1) or acknowledged
  load_cells(names)
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  local is_restoring = has_joined_before and not is_remembered
  if is_restoring and restoring_until <= now then
    restoring_until = now + RESTORE_MS
    redis.call('HSET', meta_key, 'regains', restoring_until)
  end
  local config = { stamp, first_joined == 0 and now or first_joined }
  local others, is_newest = compare_config(config)
  local created, differing, continuing = {}, 0, cells_used_again(names, configured)
  for _, name in ipairs(names) do
    local cell, node, new = cells[name], from_node[name], configured[name]
    local is_overridden = cell and cell.override ~= 0
    if is_overridden and is_newest then
      -- The limits that are in force when the override ends.
      cell.file_limit, cell.file_burst, is_changed[name] = new.limit, new.burst, true
    end
    if not cell then
      cells[name], is_changed[name], created[#created + 1] = node, true, name
    elseif is_newest and not is_overridden and not has_limits(cell, new.limit, new.burst) then
      set_limits(cell, new.limit, new.burst)
      is_changed[name] = true
      if others > 0 then differing = differing + 1 end
    elseif not has_limits(cell, node.limit, node.burst) then
      if not is_overridden and not has_limits(cell, new.limit, new.burst) then differing = differing + 1 end
    elseif is_restoring then
      restore_level(name, cell, node, is_same_data_set)
      is_changed[name] = true
    end
  end
  for _, name in ipairs(continuing) do is_changed[name] = true end
  for _, name in ipairs(created) do continuing[#continuing + 1] = name end
  if #continuing > 0 then continue_removed(continuing, names) end
  if is_newest then record_names(names, configured) end
  for _, name in ipairs(created) do save_base(name, cells[name]) end
  local expiry = now + SESSION_TIMEOUT_MS
  redis.call('HSET', meta_key, 's:' .. session, expiry, 'q:' .. session, applied, 'born', data_set)
  -- Restored cells have the limits that were in force before, maybe of another config. A heartbeat finds out.
  record_config(config, is_newest, is_newest and not (is_restoring and #created > 0))
  -- The server has lost its data, or never had any: the first node restores the override of `enforce`.
  if not meta[4] and enforce > 0 then
    redis.call('HSET', meta_key, 'enforce', enforce, 'enforce_until', enforce_until)
  end
  redis.call('HDEL', meta_key, 'o:' .. session)
  count_alive()
  save_cells()
  return { DONE, now, #created, differing, is_remembered and 1 or 0, max(restoring_until - now, 0), applied, data_set }
end

-- Holds again the reservations that a rejoining node lists, if the server has charged or lost them. Skips a
-- reservation if the server has applied the step that settles it.
function commands.hold()
  local is_new, listed, all = read_int() == 1, {}, {}
  for i = 1, read_int() do
    local reservation = { id = read_text(), settled_by = read_int(), pieces = {} }
    for k = 1, read_int() do
      local piece = { read_amounts(), read_amounts(), {}, {} }
      for j = 1, read_int() do piece[3][j], piece[4][j] = read_text(), read_int() end
      reservation.pieces[k] = piece
    end
    listed[i] = reservation
  end
  if not is_session_open() then return { UNKNOWN_SESSION, now } end
  local last = tonumber(redis.call('HGET', meta_key, 'q:' .. session)) or 0
  local missing = {}
  for _, reservation in ipairs(listed) do
    local is_over = reservation.settled_by > 0 and reservation.settled_by <= last
    if not is_over and redis.call('HEXISTS', reservations_key, reservation.id) == 0 then
      reservation.charged = redis.call('HGET', charged_key_of(session), reservation.id)
      if reservation.charged then reservation.pieces = cmsgpack.unpack(reservation.charged) end
      if #reservation.pieces > 0 then missing[#missing + 1], all[reservation.id] = reservation, reservation.pieces end
    end
  end
  local touched = cell_names(all)
  load_cells(touched)
  if not advance_to_now(touched) then return { STALE_PERIOD, now } end
  for _, reservation in ipairs(missing) do
    if reservation.charged then hold_again(reservation.pieces) else restore_reservation(reservation.pieces, is_new) end
    redis.call('HSET', reservations_key, reservation.id, cmsgpack.pack(reservation.pieces))
    redis.call('HDEL', charged_key_of(session), reservation.id)
  end
  if #missing > 0 then redis.call('HINCRBY', meta_key, 'in_flight', #missing) end
  save_cells()
  return { DONE, now }
end

-- Charges in full all reservations of a rejoining node except those that the node lists. The unlisted ones have
-- ended, and the server lost the steps that settled them, for example when it restarted from an older file. Returns
-- leased tokens. Replies with the number of reservations that are left for another call.
function commands.only()
  local is_held = {}
  for _ = 1, read_int() do is_held[read_text()] = true end
  if not is_session_open() then return { UNKNOWN_SESSION, now } end
  local charged, orphans, count, left = charged_key_of(session), {}, 0, 0
  local charged_lease = unpack_pieces(redis.call('HGET', charged, LEASE))
  -- Both leases exist if a delayed step for a request from the charged lease has created a new one.
  orphans[LEASE] = unpack_pieces(redis.call('HGET', reservations_key, LEASE))
  for _, piece in ipairs(charged_lease) do table.insert(orphans[LEASE], piece) end
  for _, id in ipairs(redis.call('HKEYS', reservations_key)) do
    if id ~= LEASE and not is_held[id] then
      if count < MAX_CHARGED then
        orphans[id] = cmsgpack.unpack(redis.call('HGET', reservations_key, id))
        count = count + 1
      else
        left = left + 1
      end
    end
  end
  local names = cell_names(orphans)
  load_cells(names)
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  hold_again(charged_lease)
  for id, pieces in pairs(orphans) do
    if id ~= LEASE then
      charge_in_full(pieces)
    else
      for _, piece in ipairs(pieces) do settle_piece(piece, { 0, 0, 0, 0 }) end
    end
    redis.call('HDEL', reservations_key, id)
  end
  redis.call('HDEL', charged, LEASE)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  save_cells()
  return { DONE, now, left }
end

-- Charges some reservations of an ended session in full. They are stored under another key, with the reset counts of
-- their cells as fifth element of each piece, in case the node rejoins. Returns whether these were the last, and
-- their number. One HSCAN may find nothing although there are more fields, because all fields where it starts may
-- have been deleted.
local function charge(ended)
  local from, to = reservations_key_of(ended), charged_key_of(ended)
  local cursor, found = 0, {}
  repeat
    local part = redis.call('HSCAN', from, cursor, 'COUNT', MAX_CHARGED)
    cursor, found = part[1], part[2]
  until #found > 0 or cursor == '0'
  local reservations, count = {}, 0
  for i = 1, #found, 2 do reservations[found[i]] = cmsgpack.unpack(found[i + 1]) end
  local names = cell_names(reservations)
  load_cells(names)
  if not advance_to_now(names) then return false, 0 end
  for i = 1, #found, 2 do
    local id = found[i]
    charge_in_full(reservations[id])
    for _, piece in ipairs(reservations[id]) do piece[5] = reset_counts(piece[3]) end
    redis.call('HSET', to, id, cmsgpack.pack(reservations[id]))
    redis.call('HDEL', from, id)
    if id ~= LEASE then count = count + 1 end
  end
  if #found == 0 then return true, 0 end
  redis.call('PEXPIRE', to, RETENTION_MS)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  return redis.call('HLEN', from) == 0, #found / 2
end

-- Records that a cell is in use. Writes no other field, because cells that are only read are not saved.
local function mark_seen(name)
  cells[name].seen = now
  if is_changed[name] then return end
  local cell = cmsgpack.unpack(redis.call('HGET', cells_key, name))
  cell.seen = now
  redis.call('HSET', cells_key, name, cmsgpack.pack(cell))
end

-- Once in an interval, records that these cells are in use and removes cells that have not been used for long.
local function tidy(names)
  local longest = RETENTION_MS
  for _, name in ipairs(names) do
    local cell = cells[name]
    longest = max(longest, cell_retention_ms(cell))
    if now - (cell.seen or 0) > SEEN_INTERVAL_MS then mark_seen(name) end
  end
  -- Other nodes may have quotas with longer periods, so a node never shortens the expiry.
  for _, key in ipairs({ cells_key, meta_key, reservations_key, overrides_key }) do
    if redis.call('PTTL', key) < longest then redis.call('PEXPIRE', key, longest) end
  end
  if now - (tonumber(redis.call('HGET', meta_key, 'tidied')) or 0) < SEEN_INTERVAL_MS then return end
  redis.call('HSET', meta_key, 'tidied', now)
  local all = redis.call('HKEYS', cells_key)
  load_cells(all)
  for _, name in ipairs(all) do
    local cell = cells[name]
    if cell.held == 0 and now - (cell.seen or now) > cell_retention_ms(cell) then
      redis.call('HDEL', cells_key, name)
      cells[name], is_changed[name] = false, nil
    end
  end
end

-- A heartbeat: renews the session, ends and charges sessions that were not renewed, and ends overrides. Replies with
-- the number of nodes alive, the number of requests in flight, the version of the overrides, the override of `enforce`
-- and its end, 1 if the node must join again so that the limits of its config apply, and the states of the cells.
function commands.beat()
  local names = read_texts(read_int())
  load_cells(names)
  if not is_session_open() or not all_exist(names) then return { UNKNOWN_SESSION, now } end
  if not advance_to_now(names) then return { STALE_PERIOD, now } end
  local gap = now - (tonumber(redis.call('HGET', meta_key, 'beat')) or now)
  redis.call('HSET', meta_key, 'beat', now, 's:' .. session, now + SESSION_TIMEOUT_MS)
  local fields, ended, alive = redis.call('HGETALL', meta_key), {}, 1
  for i = 1, #fields, 2 do
    local field, value = fields[i], tonumber(fields[i + 1])
    local kind, other = field:sub(1, 2), field:sub(3)
    if kind == 'o:' then
      ended[#ended + 1] = other
    elseif kind == 's:' and other ~= session then
      -- If the clock was stepped back, the session would end too late, so it is shortened.
      local is_renewed = value > now + SESSION_TIMEOUT_MS or (value > 0 and gap > OUTAGE_MS)
      if is_renewed then redis.call('HSET', meta_key, field, now + SESSION_TIMEOUT_MS) end
      if is_renewed or value > now then
        alive = alive + 1
      elseif value > 0 then
        -- The session ends now, even if several heartbeats are needed to charge all its reservations.
        redis.call('HSET', meta_key, field, -now, 'o:' .. other, now)
        ended[#ended + 1] = other
      end
    end
  end
  local charged = 0
  for _, other in ipairs(ended) do
    -- The next heartbeat charges the rest. A longer call would block the other nodes.
    if charged >= MAX_CHARGED then break end
    local is_complete, count = charge(other)
    charged = charged + count
    if is_complete then archive_session(other) end
  end
  redis.call('HSET', meta_key, 'alive', alive)
  end_overrides(names)
  tidy(names)
  save_cells()
  local reply = { DONE, now, alive }
  for _, value in ipairs({ 'in_flight', 'overrides', 'enforce', 'enforce_until' }) do
    reply[#reply + 1] = tonumber(redis.call('HGET', meta_key, value)) or 0
  end
  reply[#reply + 1] = must_set_limits() and 1 or 0
  for _, name in ipairs(names) do append_state(reply, name) end
  return reply
end

-- Closes a session that has settled everything. A session with reservations stays open until it expires, and is then
-- charged.
function commands.leave()
  if redis.call('HLEN', reservations_key) > 0 then return { DONE, now } end
  redis.call('HDEL', meta_key, 's:' .. session, 'q:' .. session, 'c:' .. session)
  return { DONE, now }
end

return commands[command]()
